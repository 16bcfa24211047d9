"""`python -m saezoo` is `saezoo`."""

from saezoo.cli import main

if __name__ == "__main__":
    main()
