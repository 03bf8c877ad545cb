"""A hub that is a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Hub:
    """A stub of ``HfApi``: repositories are folders, and commits are counted."""

    def __init__(self, root: Path) -> None:
        self.root, self.commits, self.branches = root, 0, []
        self.error: Exception | None = None

    def __call__(self, token: Any = None, library_name: str | None = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: Any, exist_ok: bool) -> Any:
        if self.error is not None:
            raise self.error
        self.private = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
        self.branches.append(branch)

    def file_exists(self, repo: str, name: str, *, revision: Any) -> bool:
        return (self.root / repo / name).exists()

    def hf_hub_download(self, repo: str, name: str, *, revision: Any) -> str:
        return str(self.root / repo / name)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        repo, self.options = self.root / repo_id, options
        self.commits += 1
        for pattern in options["delete_patterns"]:
            for file in repo.glob(pattern):
                file.unlink()
        ignored = [".*", *(options["ignore_patterns"] or ())]
        shutil.copytree(
            folder_path, repo, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignored)
        )
        address = f"https://hub.example/{repo_id}/commit/{self.commits}"
        return SimpleNamespace(commit_url=address, pr_url=f"{address}/pr")
