"""Two processes on one output: the second is refused, and a dead one blocks nobody."""

import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from qpeft.commands._claim import claimed
from qpeft.errors import StateError

HOLD = """
import sys, time
from pathlib import Path
from qpeft.commands._claim import claimed
with claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_until_the_first_is_dead(tmp_path):
    path = tmp_path / "run.trec.partial"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(StateError, match=r"run\.trec\.partial: another process is working on it"), claimed(path):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with claimed(path):
        pass
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", denied)  # those who run tests may be allowed everything
    with pytest.raises(StateError, match="cannot be written to: Permission denied"), claimed(tmp_path / "run.partial"):
        pass
