FROM nvidia/cuda:13.0.1-base-ubuntu24.04

LABEL org.opencontainers.image.title="kdlm" \
      org.opencontainers.image.description="Knowledge distillation on the Hugging Face Trainer" \
      org.opencontainers.image.licenses="Apache-2.0"

# Triton compiles small launchers at run time, hence gcc and Python's headers. The archive of Ubuntu keeps only the
# newest build of a package, so pinned versions would stop existing.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 --user-group kdlm && python3 -m venv /opt/kdlm/venv
ENV PATH=/opt/kdlm/venv/bin:$PATH

ARG EXTRAS=kernels,quant,quickstart
WORKDIR /opt/kdlm/source
COPY pyproject.toml constraints.txt constraints-cpu.txt README.md LICENSE ./
COPY kdlm kdlm
COPY kernels kernels
RUN torch="$(sed -n 's/^torch==//p' constraints-cpu.txt)" \
 && pip install --no-cache-dir -c constraints.txt "torch==${torch}" ".[${EXTRAS}]"

USER 10001
WORKDIR /home/kdlm
ENTRYPOINT ["kdlm"]
CMD ["--help"]
