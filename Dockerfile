# syntax=docker/dockerfile:1
# Two images from one file, neither of them run by root:
#   docker build --target train -t tldist:train .     fine-tune, fuse, align, export, embed (PyTorch, GPU-ready)
#   docker build --target serve -t tldist:serve .     run, check and embed with packages: no torch in it
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/work" tldist:train finetune data=photos model=resnet50 out=runs/first
# The layers are ordered by how seldom they change: base, third-party libraries, then tldist itself.

FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 1000 tldist && mkdir /work && chown tldist /work
WORKDIR /src

# What is needed to know the dependencies, and nothing that changes with each commit: an empty package is enough for
# pip to install them. launch/ and export/ are named by the wheel, so they must exist.
FROM base AS metadata
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p tldist launch export && touch tldist/__init__.py

FROM metadata AS train-libraries
RUN pip install -c constraints.txt '.[train,report]' && pip uninstall -y tldist

FROM metadata AS serve-libraries
# embed: vectors from a package; serve: HTTP; gpu: the ONNX Runtime that has both CUDA and CPU (choose cpu for a smaller image)
ARG RUNTIME=gpu
RUN pip install -c constraints.txt ".[$RUNTIME,embed,serve]" && pip uninstall -y tldist

FROM train-libraries AS train
COPY . .
RUN pip install --no-deps . && rm -rf /src/*
USER tldist
WORKDIR /work
ENTRYPOINT ["tldist"]
CMD ["--help"]

FROM serve-libraries AS serve
COPY . .
# The claim is proved while building: the image has no torch, and tldist works without it.
RUN pip install --no-deps . && rm -rf /src/* \
    && ! python -c "import torch" 2>/dev/null && python -c "import tldist.runtime.package, tldist.embed.run, tldist.serve.run"
USER tldist
WORKDIR /work
ENTRYPOINT ["tldist"]
CMD ["--help"]
