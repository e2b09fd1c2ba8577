# One image for Binder and JupyterHub: JupyterLab on the chapters, which need no network.
FROM python:3.11-slim-bookworm

# git: a run records its commit. make: the Makefile installs the lock file, here as anywhere.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# Binder gives the name and the number; JupyterHub's usual ones are the defaults. The book is not in
# the home folder, which a hub often covers with a volume of its own.
ARG NB_USER=jovyan
ARG NB_UID=1000
RUN useradd --create-home --shell /bin/bash --uid "${NB_UID}" "${NB_USER}" \
    && install -d -o "${NB_UID}" -g "${NB_UID}" /opt/activations
ENV USER=${NB_USER} HOME=/home/${NB_USER} SHELL=/bin/bash
WORKDIR /opt/activations
USER ${NB_UID}

# On Linux pip takes the torch with CUDA, several gigabytes more; an index of CPU builds, given with
# --build-arg, leaves it out.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1
COPY --chown=${NB_UID}:${NB_UID} Makefile pyproject.toml requirements.lock README.md ./
COPY --chown=${NB_UID}:${NB_UID} lib lib
RUN make .venv/ready PYTHON=python3.11
ENV PATH=/opt/activations/.venv/bin:${PATH}

# What the hub starts in a user's container, of the hub's own major version. The lock file stays as
# it is: a version that would change it is an error here.
ARG JUPYTERHUB_VERSION=6.1.1
RUN python -m pip install -q --constraint requirements.lock \
        "jupyterhub==${JUPYTERHUB_VERSION}" notebook==7.6.5 \
    && mkdir -p .venv/etc/jupyter \
    && echo '{"ServerApp": {"default_url": "/lab/tree/chapters"}, "LabApp": {"default_url": "/lab/tree/chapters"}}' \
        > .venv/etc/jupyter/jupyter_server_config.json

COPY --chown=${NB_UID}:${NB_UID} . .

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser"]
