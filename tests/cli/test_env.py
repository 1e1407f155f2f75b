"""`nrccr env`: what a bug report needs, and nothing private."""

import json

from modeling_nrccr.cli import env
from modeling_nrccr.loading import environment


class Ours:
    """A distribution with two extras, of which one is there."""

    requires = ["torch>=2", 'numpy>=1; extra == "small"', 'numpy<1; extra == "old"', 'no-such-thing; extra == "big"']

    class metadata:
        @staticmethod
        def get_all(name):
            return ["small", "old", "big"]


def test_it_tells_versions_and_no_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NRCCR_CACHE", str(tmp_path / "secret-place"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "secret-place").mkdir()
    (tmp_path / "secret-place/wheel").write_bytes(bytes(20_000_000))
    env.main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("python", *environment.LIBRARIES, "HF_TOKEN", "NRCCR_CACHE", "cpu ("))
    assert "0.02 GB in 1 files" in printed and "secret" not in printed
    env.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == environment.installed_version("torch") and found["devices"]


def test_extras_are_those_whose_parts_are_all_there(monkeypatch):
    monkeypatch.setattr(environment, "distribution", lambda name: Ours)
    whole, lacking = environment.find_extras()
    numpy = environment.installed_version("numpy")
    assert whole == ["small"] and lacking == [f"old (numpy<1, which is {numpy})", "big (no-such-thing)"]


def test_from_a_checkout_that_is_not_installed_nothing_is_claimed():
    assert environment.find_extras("no-such-distribution") == ([], [])
    assert environment.installed_version("no-such-distribution") is None
