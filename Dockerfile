# Training and scoring, on one machine or as the image of a SLURM job. Commands: eval/container.sh.
#
#   docker build -t polar:eval .
#   docker build -t polar:eval --build-arg BASE_IMAGE=nvidia/cuda:12.9.1-devel-ubuntu24.04 .   # another CUDA
#
# The base has CUDA's compiler, with which DeepSpeed builds its operators when a run asks for them. A base that brings
# the pinned torch keeps it.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The versions are those of the base's release, whichever it is.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# From the largest and rarest change to the smallest: torch, the requirements, this project.
COPY requirements-torch.txt requirements.txt constraints.txt /opt/polar/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/python -m pip install -r /opt/polar/requirements-torch.txt -c /opt/polar/constraints.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/python -m pip install -r /opt/polar/requirements.txt setuptools -c /opt/polar/constraints.txt

ENV PATH=/opt/venv/bin:$PATH \
    PIP_CONSTRAINT="/opt/polar/constraints.txt /opt/polar/requirements-torch.txt"
COPY . /opt/polar
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation -e /opt/polar \
    && python -m compileall -q /opt/polar \
    && useradd --uid 10001 --home-dir /home/polar polar \
    && install -d -m 1777 /home/polar \
    && install -d -o polar -g polar /cache /out \
    && ln -s /out /opt/polar/out \
    && ln -s /out /opt/polar/runs

# No USER: the entry point goes on as the owner of what is mounted, uid 10001 where nothing is; see there.
# COMMIT is written into the runs: --build-arg COMMIT="$(git rev-parse HEAD)".
ARG COMMIT=
ENV HF_HOME=/cache HOME=/home/polar USER=polar POLAR_COMMIT=${COMMIT}
WORKDIR /opt/polar
ENTRYPOINT ["/opt/polar/eval/container.sh"]
CMD ["--help"]
