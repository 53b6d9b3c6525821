# Anton with what an app needs to serve and work. The app itself is mounted at /app.
FROM python:3.12-slim
WORKDIR /anton
COPY requirements.lock .
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && useradd --system anton
USER anton
WORKDIR /app
