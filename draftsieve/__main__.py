"""`python -m draftsieve` is the command `draftsieve`."""

from draftsieve.integrations.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
