-- Two databases and their owners; run as a superuser with both passwords set as psql variables.
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE mlflow OWNER mlflow;
\connect prefect
CREATE EXTENSION IF NOT EXISTS pg_trgm;
