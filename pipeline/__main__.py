"""`python -m pipeline`, which is also how torchrun starts a rank: `torchrun -m pipeline train`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
