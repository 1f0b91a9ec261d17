"""The command line: `main` runs it, the other files hold its commands."""
