"""`python -m restrain` is the command `restrain`."""

from restrain.cli import main

if __name__ == "__main__":
    main()
