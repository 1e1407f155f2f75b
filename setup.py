from setuptools import find_packages, setup


VIDEO = ["av>=14"]
HEIC = ["pillow-heif>=1.0,<2"]  # the pictures of phones
SEQ2SEQ = ["sentencepiece>=0.2", "sacremoses>=0.1"]
CTRANSLATE2 = [*SEQ2SEQ, "ctranslate2>=4.6,<5"]
LORA = ["peft>=0.17,<1"]
RETRIEVAL = ["faiss-cpu>=1.9,<2"]  # galleries in memory and in folders
SPACE = [*RETRIEVAL, "gradio>=6.20,<7"]  # gradio 6.31 wants pillow<13
SERVE = [*RETRIEVAL, "fastapi>=0.110,<1", "uvicorn>=0.30,<1"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20,<2", "onnxscript>=0.5"]
MILVUS = [*RETRIEVAL, "pymilvus>=3.0,<4", "milvus-lite>=3.2,<4"]
NOISE = ["sacrebleu>=2.5,<3", "py3langid>=0.4,<0.5"]  # measures of translations
MTEB = ["mteb>=2.26,<3"]  # without its extra `image`, which brings torchvision
BENCHMARKS = ["torchmetrics>=1.9,<2", "ranx>=0.3.21,<0.4"]  # peers of the metrics, which CI does without

setup(
    name="modeling_nrccr",
    version="0.1.0",
    description="Cross-lingual picture and video retrieval that survives translation noise, for Hugging Face",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["modeling_nrccr*", "datasets_scripts*"]),
    package_data={
        "datasets_scripts": ["*.sha256"],
        "modeling_nrccr.recipes": ["*.yaml", "*/*.yaml", "README.md"],
        "modeling_nrccr.publishing": ["*.md"],
        "modeling_nrccr.space": ["*.css", "*.md", "*.txt"],
    },
    entry_points={"console_scripts": ["nrccr = modeling_nrccr.cli.main:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.20,<6",
        "datasets>=5.0,<6",
        "accelerate>=1.10,<2",
        "evaluate>=0.4.6,<1",
        "huggingface_hub>=2.0,<3",
        "langcodes>=3.5,<4",
        "safetensors>=0.5",
        "filelock>=3.13",
        "numpy>=2",
        "packaging>=22",
        "pillow>=11.3",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "video": VIDEO,
        "heic": HEIC,
        "seq2seq": SEQ2SEQ,
        "ctranslate2": CTRANSLATE2,
        "noise": NOISE,
        "retrieval": RETRIEVAL,
        "milvus": MILVUS,
        "space": SPACE,
        "serve": SERVE,
        "export": EXPORT,
        "lora": LORA,
        "mteb": MTEB,
        "benchmarks": BENCHMARKS,
        "dev": [
            "pytest>=8",
            "ruff>=0.9",
            "psutil>=6",
            "pytrec-eval-terrier>=0.5.7",
            "matplotlib>=3.10",
            "playwright>=1.50",
            *VIDEO,
            *HEIC,
            *CTRANSLATE2,
            *NOISE,
            *MILVUS,
            *SPACE,
            *SERVE,
            *EXPORT,
            *LORA,
            *MTEB,
            "sentence-transformers>=6.2,<7",
        ],
    },
)
