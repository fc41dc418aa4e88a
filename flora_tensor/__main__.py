"""Run the command line: ``python -m flora_tensor``."""

from flora_tensor.cli import main

if __name__ == "__main__":
    main(prog_name="flora-tensor")
