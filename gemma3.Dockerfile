# As Dockerfile, on NVIDIA's PyTorch image: its torch, built for its CUDA and its NCCL, stays. For Gemma-3-27B.
#
#   docker build -f gemma3.Dockerfile -t polar:gemma3 --build-arg BASE_IMAGE=REGISTRY/nvidia/pytorch:25.12-py3 .
#
# The default is the name of a base that was pulled and tagged so. It needs torch 2.9 or newer: 25.11 on.
ARG BASE_IMAGE=nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What is compiled against the base's torch, and torch, stay as they are; all else is as pinned, in an environment of
# its own in front of the base's. The base's own constraint file also holds what has nothing to do with torch.
COPY requirements.txt constraints.txt /opt/polar/
ENV PIP_CONSTRAINT=/opt/venv/constraints.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c 'import torch; print(torch.__version__, torch.__file__)' >/tmp/torch-of-base \
    && python3 -m venv --system-site-packages /opt/venv \
    && python3 -m pip list --format=freeze \
        | grep -iE '^(torch|torchvision|torchaudio|torchao|triton|pytorch[-_]triton|numpy|flash[-_]attn|transformer[-_]engine.*)==' \
        >/opt/venv/base.txt \
    && grep -viE "^($(cut -d= -f1 /opt/venv/base.txt | paste -sd '|'))==" /opt/polar/constraints.txt \
        | cat - /opt/venv/base.txt >"$PIP_CONSTRAINT" \
    && /opt/venv/bin/python -m pip install -r /opt/polar/requirements.txt setuptools \
    && /opt/venv/bin/python -c 'import torch; print(torch.__version__, torch.__file__)' | diff /tmp/torch-of-base - \
    && rm /tmp/torch-of-base

ENV PATH=/opt/venv/bin:$PATH
COPY . /opt/polar
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation -e /opt/polar \
    && python -m compileall -q /opt/polar \
    && useradd --uid 10001 --home-dir /home/polar polar \
    && install -d -m 1777 /home/polar \
    && install -d -o polar -g polar /cache /out \
    && ln -s /out /opt/polar/out \
    && ln -s /out /opt/polar/runs

ARG COMMIT=
ENV HF_HOME=/cache HOME=/home/polar USER=polar POLAR_COMMIT=${COMMIT}
WORKDIR /opt/polar
ENTRYPOINT ["/opt/polar/eval/container.sh"]
CMD ["--help"]
