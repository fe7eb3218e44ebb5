"""``python -m dpal_edge``, which is also what torchrun starts."""

from dpal_edge.cli import main

if __name__ == "__main__":
    main(prog_name="dpal-edge")
