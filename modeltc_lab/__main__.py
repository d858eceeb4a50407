"`python -m modeltc_lab` is the `modeltc-lab` command."

from modeltc_lab.core.cli import entry

if __name__ == "__main__":
    entry()
