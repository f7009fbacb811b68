"""Every Python block of the manual and the README runs, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {
    str(page.relative_to(ROOT)): BLOCK.findall(page.read_text())
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_code_blocks_run(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as users do
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(PAGES[page]):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), namespace)
    torch.set_default_dtype(torch.float64)
