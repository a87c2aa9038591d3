"""Hands the package build over to build.py; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


class BuildNative(build_ext):
    def run(self) -> None:
        import build

        out = ROOT / "plugin" / "ggml_tp" if self.inplace or self.editable_mode else Path(self.build_lib) / "ggml_tp"
        if build.main(["--out", str(out)]) != 0:
            raise SystemExit("ggml-tp: build.py failed, see above")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPython(bdist_wheel):
    """The libraries hold no Python: one wheel serves every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[Extension("ggml_tp._native", sources=[])], cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython})
