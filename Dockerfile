# A server of posteriors on the CPU; the network and the posteriors are mounted:
#   docker build -t pyrolora .
#   docker run -p 127.0.0.1:8000:8000 -e PYROLORA_API_KEY=... \
#       -v ./posteriors:/posteriors:ro -v ./network:/network:ro pyrolora

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /venv
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
# torch alone first, in a layer that stays. With PyTorch's index of builds for the CPU it has a fifth
# of the size: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=""
RUN /venv/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch
COPY pyrolora pyrolora
COPY models models
RUN /venv/bin/pip install --constraint constraints.txt '.[serve]'

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 pyrolora
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
USER pyrolora
WORKDIR /home/pyrolora
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["pyrolora", "serve"]
CMD ["/posteriors", "--model", "/network", "--host", "0.0.0.0"]
