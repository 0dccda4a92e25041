"""`steelyard key`: types, backups, and the way out of a lost passphrase."""

from __future__ import annotations

from pathlib import Path

from commands import refused, steelyard


def test_types_export_import_and_the_spare_revocation(tmp_path: Path) -> None:
    place, other = ["--keys", tmp_path / "keys"], ["--keys", tmp_path / "other"]
    made = steelyard("key", "new", "me", "--type", "ed25519", *place)
    spare = tmp_path / "keys" / "spare" / "me.revocation.dsse.json"
    assert f"spare revocation: {spare} (move it to another place" in made.out
    assert steelyard("key", "new", "you", "--type", "rsa", *place, code=2).err

    public = steelyard("key", "export", "me", tmp_path / "me.pem", *place, without=["STEELYARD_PASSPHRASE"])
    assert Path(public.out.strip()).read_text().startswith("-----BEGIN PUBLIC KEY-----")
    backup = steelyard("key", "export", "me", tmp_path / "backup", "--private", *place).out.strip()
    refused(
        steelyard("key", "import", backup, *other, code=1, env={"STEELYARD_PASSPHRASE": "another passphrase"}),
        "the passphrase is wrong",
    )
    assert steelyard("key", "import", backup, *other).out.rstrip().endswith(", active")
    refused(steelyard("key", "import", backup, *other, code=1), "this key is there already, as 'me'")

    for wrong in (["--reason", "x", "--spare", spare], []):
        assert "give --reason, or --spare FILE" in steelyard("key", "revoke", "me", *wrong, *place, code=2).err
    # Nobody knows the passphrase any more.
    revoked = steelyard("key", "revoke", "me", "--spare", spare, *place, without=["STEELYARD_PASSPHRASE"])
    assert Path(revoked.out.strip()).is_file()
    [shown] = steelyard("key", "show", "--json", *place).json
    assert (shown["type"], shown["status"]) == ("ed25519", "revoked")
    assert "ed25519" in steelyard("key", "show", *place).out
