"""Run `mquant` as `python -m mquant`."""

from mquant.cli import main

if __name__ == "__main__":
    main()
