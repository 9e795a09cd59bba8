"""`python -m hpo` is the command `hpo`."""

from hpo.cli import command

if __name__ == "__main__":
    command()
