# CPU stand-ins for the bases of the two Dockerfiles. `cpu`: Debian with the pinned torch. `other`: the same torch under
# a version number like those of NVIDIA's builds, with a constraint file in PIP_CONSTRAINT, as there.
FROM localhost/polar-base:debian AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY requirements-torch.txt /tmp/
# Where the index has a CPU build, it saves gigabytes.
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python \
    && { python3 -m pip install --no-cache-dir "$(cat /tmp/requirements-torch.txt)+cpu" \
        || python3 -m pip install --no-cache-dir -r /tmp/requirements-torch.txt; }

FROM cpu AS other
ARG OTHER_VERSION
COPY rename_torch.py /tmp/
RUN python3 /tmp/rename_torch.py "${OTHER_VERSION}" && mkdir /etc/pip \
    && echo "torch==${OTHER_VERSION}" >/etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
