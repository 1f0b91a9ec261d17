"""`python -m atlas_blocks.recipes` is the command line."""

from atlas_blocks.recipes.command_line.main import main

main()
