"""`python -m loraloop` is `loraloop`."""

from loraloop.cli import main

if __name__ == "__main__":
    main()
