# A machine with an NVIDIA driver and the NVIDIA Container Toolkit runs this; the driver is the host's, CUDA comes with torch.
#   docker build --tag pipelite .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/training" pipelite fit --config /training/my.yaml
FROM python:3.11-slim

# A C compiler: Triton builds a small launcher for its kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY . /opt/lightning_pipelite
RUN pip install --no-cache-dir --constraint /opt/lightning_pipelite/constraints.txt /opt/lightning_pipelite

WORKDIR /training
ENTRYPOINT ["pipelite"]
CMD ["--help"]
