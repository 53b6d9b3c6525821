{#- Anton's dbt macros, version 5. `anton dbt init` puts them into a project and `anton doctor` compares the version; change nothing here.

    Two lines of dbt_project.yml, under models:, seeds: and snapshots: each, make builds fire events:

        +pre-hook: "{{ anton_before() }}"
        +post-hook: "{{ anton_after() }}"

    They do nothing where Anton is not installed in the database, outside of run, build, seed and snapshot, and with
    --vars 'anton_enabled: false'. Other vars: anton_schema (anton), anton_gate (true, false; else the tests that always gate). -#}

{% macro anton_before() -%}
  {#- what the build can have seen of others; of several batches, each in a transaction of its own, nobody knows it -#}
  {%- if anton_active() %}select pg_catalog.set_config('anton.began', pg_catalog.pg_current_snapshot()::text, true);{% endif -%}
  {#- batches of microbatch commit one by one, and only the first is told: their events are those of their writes -#}
  {%- if anton_active() and config.get('materialized') not in ('table', 'view', 'materialized_view', 'anton_table')
         and config.get('incremental_strategy') != 'microbatch' -%}
    {{ anton_call('dbt_before', anton_build()) }}
  {%- endif -%}
{%- endmacro %}

{% macro anton_after() -%}
  {%- if anton_active() -%}
    {{ anton_call('dbt_after', anton_build()) }}
  {%- endif -%}
{%- endmacro %}

{% macro anton_active() -%}
  {{ return(execute and flags.WHICH in ('run', 'build', 'seed', 'snapshot') and target.type == 'postgres'
            and (var('anton_enabled', true) | string | lower) not in ('false', '0', 'off', 'no')
            and config.get('materialized') not in ('ephemeral', 'inline', 'test', 'unit')) }}
{%- endmacro %}

{#- what dbt_before() and dbt_after() are told: see sql/72_dbt.sql of Anton -#}
{% macro anton_build() -%}
  {%- set meta = config.get('meta') or {} -%}
  {%- set key = meta.get('anton_key') or ((config.get('snapshot_table_column_names') or get_snapshot_table_column_names()).dbt_scd_id if model.resource_type == 'snapshot'
                else (model.get('primary_key') or config.get('unique_key'))) or [] -%}
  {#- views that this command builds: dbt drops them with the table that they read, and makes them anew -#}
  {%- set views = [] -%}
  {%- for node in graph.nodes.values() if node.config.materialized in ('view', 'materialized_view') and node.unique_id in selected_resources -%}{%- do views.append(node.schema ~ '.' ~ node.alias) -%}{%- endfor -%}
  {{ return({
    'project': project_name, 'unique_id': model.unique_id, 'schema': this.schema, 'name': this.identifier,
    'backup': make_backup_relation(this.incorporate(type='table'), 'table').identifier,
    'materialized': config.get('materialized'), 'invocation_id': invocation_id,
    'incremental': is_incremental(), 'full_refresh': should_full_refresh(),
    'key': [key] if key is string else key, 'gate': var('anton_gate', none), 'views': views,
    'grants': config.get('grants') or {},
    'contract': (config.get('contract') or {}).enforced | default(false)
  }) }}
{%- endmacro %}

{#- one statement that calls a function of Anton's, if it is there and this role may -#}
{% macro anton_call(name, build) -%}
  {%- set schema = var('anton_schema', 'anton') -%}
  do $anton_do$ begin
    if exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
                where n.nspname = '{{ schema }}' and p.proname = '{{ name }}' and pg_catalog.has_schema_privilege(n.oid, 'usage')) then
      perform "{{ schema }}"."{{ name }}"($anton_build${{ tojson(build) }}$anton_build$::pg_catalog.jsonb
        || pg_catalog.jsonb_build_object('search_path', pg_catalog.current_setting('search_path')));
    end if;
  end $anton_do$
{%- endmacro %}
