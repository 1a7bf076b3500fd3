"""The loopback Hub behaves as `huggingface_hub` expects of a Hub."""

import json

import pytest

from hub_server import run_python

pytestmark = pytest.mark.hub


def test_a_folder_comes_back_at_every_revision_and_offline(hub, tmp_path):
    repo_id = hub.repo_id("folder")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "large.bin").write_bytes(bytes(range(256)) * 43_000)  # 11 MB: through LFS
    (tmp_path / "folder" / "sub" / "small.txt").write_text("one")
    upload = f"""
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo({repo_id!r})
        first = api.upload_folder(repo_id={repo_id!r}, folder_path="folder").oid
        api.create_tag({repo_id!r}, tag="v1")
        open("folder/sub/small.txt", "w").write("two")
        second = api.upload_folder(repo_id={repo_id!r}, folder_path="folder").oid
        assert first != second == api.model_info({repo_id!r}).sha
        files = set(api.list_repo_files({repo_id!r}))
        assert {{"large.bin", "sub/small.txt"}} <= files, files
        print(first)
    """
    first = run_python(upload, hub.env, tmp_path).strip()
    download = f"""
        import json
        from pathlib import Path
        from huggingface_hub import hf_hub_download, snapshot_download
        read = lambda revision: (Path(snapshot_download({repo_id!r}, revision=revision)) / "sub/small.txt").read_text()
        large = Path(hf_hub_download({repo_id!r}, "large.bin")).read_bytes()
        assert large == bytes(range(256)) * 43_000
        print(json.dumps([read("main"), read("v1"), read({first!r})]))
    """
    assert json.loads(run_python(download, hub.env, tmp_path)) == ["two", "one", "one"]
    assert json.loads(run_python(download, hub.env | {"HF_HUB_OFFLINE": "1"}, tmp_path)) == ["two", "one", "one"]


def test_what_is_missing_raises_the_error_that_says_so(hub, tmp_path):
    repo_id = hub.repo_id("empty")
    code = f"""
        from huggingface_hub import HfApi, errors
        api = HfApi()
        api.create_repo({repo_id!r})
        api.create_repo({repo_id!r}, exist_ok=True)
        def error(*args, **kwargs):
            try:
                api.hf_hub_download(*args, **kwargs)
            except Exception as raised:
                return raised
        assert isinstance(error({repo_id!r}, "no.txt"), errors.EntryNotFoundError)
        assert isinstance(error({repo_id!r}, "README.md", revision="no"), errors.RevisionNotFoundError)
        assert isinstance(error({repo_id!r} + "-no", "README.md"), errors.RepositoryNotFoundError)
        try:
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id={repo_id!r} + "-no")
        except errors.RepositoryNotFoundError:
            print("done")
    """
    assert run_python(code, hub.env, tmp_path) == "done\n"


def test_a_private_repo_is_hidden_without_a_token(hub, tmp_path):
    code = f"""
        from huggingface_hub import HfApi
        HfApi().create_repo({hub.repo_id("private")!r}, private=True)
        print(HfApi().repo_exists({hub.repo_ids[-1]!r}), HfApi(token=False).repo_exists({hub.repo_ids[-1]!r}))
    """
    assert run_python(code, hub.env, tmp_path) == "True False\n"


def test_deleted_files_are_gone_and_folders_are_listed(hub, tmp_path):
    repo_id = hub.repo_id("files")
    code = f"""
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo({repo_id!r})
        for path in ("a/b/one.txt", "a/two.txt", "three.txt"):
            api.upload_file(path_or_fileobj=path.encode(), path_in_repo=path, repo_id={repo_id!r})
        api.delete_file("a/two.txt", {repo_id!r})
        assert "a/two.txt" not in api.list_repo_files({repo_id!r})
        print(sorted(entry.path for entry in api.list_repo_tree({repo_id!r}, "a")))
    """
    assert run_python(code, hub.env, tmp_path) == "['a/b']\n"
