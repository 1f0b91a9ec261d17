"""What every op needs of torch: contract, providers, FLOPs, compiled steps. Names no operation."""
