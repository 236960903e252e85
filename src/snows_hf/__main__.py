"""``python -m snows_hf`` is ``snows-hf``."""

from .cli import main


if __name__ == "__main__":
    main()
