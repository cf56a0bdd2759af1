"""`python -m pipeline`, which is also how torchrun starts a rank: `torchrun -m pipeline train`."""

if __name__ == "__main__":
    # Below the test, because the workers of `prepare` import this module again and have no use for a command line.
    from pipeline.cli.main import main

    main()
