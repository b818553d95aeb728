"""``python -m pizoo.cli``: the command line."""

from pizoo.cli import main

if __name__ == "__main__":
    main()
