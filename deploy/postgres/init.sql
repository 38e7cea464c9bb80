-- Makes the databases and their users: `llmops` for the API, `mlflow` for MLflow's backend store, and `grafana`, who may
-- only read what the dashboard "Who spends?" shows. The image of PostgreSQL runs it once, on an empty volume, as its
-- superuser; on a server of your own: psql -v ON_ERROR_STOP=1 -f init.sql, with the same variables in the environment.

\getenv api_password POSTGRES_API_PASSWORD
\getenv mlflow_password POSTGRES_MLFLOW_PASSWORD
\getenv grafana_password POSTGRES_GRAFANA_PASSWORD

CREATE ROLE llmops LOGIN PASSWORD :'api_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE grafana LOGIN PASSWORD :'grafana_password' CONNECTION LIMIT 10;
-- A slow query of a dashboard does not hold the ledger up.
ALTER ROLE grafana SET statement_timeout = '15s';
ALTER ROLE grafana SET default_transaction_read_only = on;

CREATE DATABASE llmops OWNER llmops TEMPLATE template0 ENCODING 'UTF8';
CREATE DATABASE mlflow OWNER mlflow TEMPLATE template0 ENCODING 'UTF8';
-- By default everybody may connect to every database.
REVOKE ALL ON DATABASE llmops, mlflow FROM PUBLIC;
GRANT CONNECT ON DATABASE llmops TO grafana;

\connect llmops

-- The API's migrations make the tables later, as `llmops`. Default privileges would hand over every new table, the one
-- with the hashes of keys too. So each table is granted by its name, when it is made: one that is not listed is closed.
CREATE SCHEMA reporting;

CREATE FUNCTION reporting.grant_to_grafana() RETURNS event_trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $function$
DECLARE
    made regclass;
BEGIN
    FOR made IN
        SELECT relation.oid
        FROM pg_event_trigger_ddl_commands() AS command
        JOIN pg_class AS relation ON relation.oid = command.objid
        WHERE command.classid = 'pg_class'::regclass
            AND command.schema_name = 'public'
            AND relation.relkind = 'r'
            AND relation.relname IN ('usage_by_day', 'budget_spent', 'teams', 'users', 'api_keys')
    LOOP
        EXECUTE format('GRANT SELECT ON TABLE %s TO grafana', made);
    END LOOP;
END
$function$;

CREATE EVENT TRIGGER grant_to_grafana ON ddl_command_end
    WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE')
    EXECUTE FUNCTION reporting.grant_to_grafana();
