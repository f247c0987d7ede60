"""`python -m lsgd_jax` is the `lsgd` command."""

import sys


def main() -> int:
    """Run the `lsgd` command; returns its exit code."""
    try:
        import jax  # noqa: F401 - it reads its variables of the environment.
    except ValueError as error:
        print(f"lsgd: JAX can't read a variable of the environment ({error}): change or unset it.", file=sys.stderr)
        return 2
    from lsgd_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
