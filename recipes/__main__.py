"""`python -m atlas_blocks.recipes` is the command line."""

from atlas_blocks.recipes.cli import main

main()
