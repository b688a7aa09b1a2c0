"""`python -m mquant` is `mquant`."""

from mquant.cli import main

if __name__ == "__main__":
    main()
