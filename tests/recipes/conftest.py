"""The command line as a function."""

import pytest

from atlas_blocks.recipes.command_line import main as cli


@pytest.fixture
def run(capsys, monkeypatch):
    """run("show", "atlas-tiny") -> exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return call
