"""`python -m kvdistill` is the command line (for torchrun -m kvdistill)."""

from kvdistill.cli.app import main

if __name__ == "__main__":
    main()
