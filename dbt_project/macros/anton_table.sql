{#- Anton's dbt macros, version 5. A table whose rows change in place: only those that differ are written, so its triggers, grants,
    policies, keys, readers and outside views stay as they are, and each change is an event.

        {{ config(materialized='anton_table', unique_key='id') }}          one column, or a list of them

    The key may come from a primary_key constraint or from the tests unique and not_null, too. New columns are added first,
    in a short transaction of their own, as readers wait for it, and filled without an event; when one goes, or has another type, with --full-refresh, and
    while row level security holds for who builds it, the table is made anew and swapped in, as dbt's `table` is. -#}

{% materialization anton_table, adapter='postgres' %}
  {%- set existing = load_cached_relation(this) -%}
  {%- set target_relation = this.incorporate(type='table') -%}
  {%- set intermediate = make_intermediate_relation(target_relation) -%}
  {%- set backup = make_backup_relation(target_relation, 'table' if existing is none else existing.type) -%}
  {%- set grant_config = config.get('grants') -%}
  {%- set key = anton_table_key() -%}
  {{ drop_relation_if_exists(load_cached_relation(intermediate)) }}
  {{ drop_relation_if_exists(load_cached_relation(backup)) }}

  {%- set place = {'added': [], 'in_place': existing is not none and existing.is_table and not should_full_refresh() and not anton_table_hidden(existing)} -%}
  {{ run_hooks(pre_hooks, inside_transaction=False) }}
  {%- if place.in_place -%}
    {%- do place.update(added=anton_table_widen(target_relation, sql, key)) -%}
  {%- endif -%}
  {{ run_hooks(pre_hooks, inside_transaction=True) }}

  {%- if place.in_place -%}
    {#- two builds at once: the second waits before it reads anything; readers do not -#}
    {% call statement('anton_lock') %}
      lock table {{ target_relation }} in share row exclusive mode
    {% endcall %}
    {#- not temporary, as those are not read in parallel; it goes with the transaction in any case -#}
    {%- set temp = intermediate -%}
    {% call statement('anton_fill') %}
      {{ anton_table_fill_sql(temp, sql) }}
    {% endcall %}
    {%- set have, want = anton_columns(target_relation.include(database=false)), anton_columns(temp.include(database=false)) -%}
    {%- if have != want -%}
      {%- do place.update(in_place=false) -%}
      {% do run_query('drop table ' ~ temp) %}
    {%- endif -%}
  {%- endif -%}

  {%- if place.in_place -%}
    {#- without it the planner takes the key for a bad one to hash by; 300 rows of it will do, as the table goes -#}
    {% do run_query('set local default_statistics_target = 1; analyze ' ~ temp ~ ' (' ~ anton_table_list(key) ~ '); set local default_statistics_target to default') %}
    {% do run_query(anton_table_key_sql(target_relation, key)) %}
    {%- set came = anton_table_came(place.added) -%}
    {% do run_query(anton_table_diff_sql(target_relation, temp, key, want, came)) %}
    {%- if came -%}
      {#- no record is another because a column came, as for every other kind of table -#}
      {%- if anton_active() %}{% do run_query(anton_call('dbt_hush', anton_build())) %}{% endif -%}
      {% do run_query(anton_table_update_sql(target_relation, key, want, 'c')) %}
      {%- if anton_active() %}{% do run_query(anton_call('dbt_speak', anton_build())) %}{% endif -%}
    {%- endif -%}
    {% call statement('main') %}
      {{ anton_table_apply_sql(target_relation, load_result('anton_fill')['response'].rows_affected, key, want) }}
    {% endcall %}
    {% do run_query('drop table ' ~ temp ~ ', pg_temp.anton_table_diff') %}
  {%- else -%}
    {% call statement('main') %}
      {{ get_create_table_as_sql(False, intermediate, sql) }}
    {% endcall %}
    {% do run_query(anton_table_key_sql(intermediate, key)) %}
    {% do create_indexes(intermediate) %}
    {% do run_query('analyze ' ~ intermediate) %}
    {%- if existing is not none -%}
      {{ adapter.rename_relation(existing, backup) }}
    {%- endif -%}
    {{ adapter.rename_relation(intermediate, target_relation) }}
  {%- endif -%}

  {{ run_hooks(post_hooks, inside_transaction=True) }}

  {% do apply_grants(target_relation, grant_config, should_revoke=should_revoke(existing, full_refresh_mode=not place.in_place)) %}
  {% do persist_docs(target_relation, model) %}
  {{ adapter.commit() }}
  {%- if not place.in_place -%}
    {{ drop_relation_if_exists(backup) }}
  {%- endif -%}
  {{ run_hooks(post_hooks, inside_transaction=False) }}
  {{ return({'relations': [target_relation]}) }}
{% endmaterialization %}

{% macro anton_table_key() -%}
  {%- set key = config.get('unique_key') or (config.get('meta') or {}).get('anton_key') or model.get('primary_key') or [] -%}
  {%- set key = [key] if key is string else key -%}
  {%- if not key -%}
    {{ exceptions.raise_compiler_error("anton_table needs a key: config(unique_key='id'), a primary_key constraint, or the tests unique and not_null on one column") }}
  {%- endif -%}
  {{ return(key) }}
{%- endmacro %}

{#- whether row level security hides rows of it from this role: who does not see them cannot change them in place -#}
{% macro anton_table_hidden(relation) -%}
  {{ return(run_query("select pg_catalog.row_security_active($anton$" ~ relation.include(database=false) ~ "$anton$::pg_catalog.regclass)").rows[0][0]) }}
{%- endmacro %}

{#- columns that the model has and its table lacks are added and committed, before the long part; which -#}
{% macro anton_table_widen(relation, sql, key) -%}
  {% call statement('anton_shape') %}
    create temp table anton_table_shape on commit drop as ({{ anton_table_select(sql) }}) with no data
  {% endcall %}
  {%- set have, want = anton_columns(relation.include(database=false)), anton_columns('pg_temp.anton_table_shape') -%}
  {%- set added, alters = [], [] -%}
  {%- for name in want if name not in have -%}
    {%- do added.append(name) -%}
    {%- do alters.append('add column if not exists ' ~ adapter.quote(name) ~ ' ' ~ want[name]) -%}
  {%- endfor -%}
  {%- set same = [] -%}
  {%- for name in have if want.get(name) == have[name] -%}{%- do same.append(name) -%}{%- endfor -%}
  {%- if added and same | length == have | length and not added | select('in', key) | list -%}
    {% do run_query('alter table ' ~ relation ~ ' ' ~ alters | join(', ')) %}
  {%- endif -%}
  {% do adapter.commit() %}
  {#- psycopg2 began the first one, and believes it open: it begins no other by itself -#}
  {% do run_query('begin') %}
  {{ return(added) }}
{%- endmacro %}

{#- columns that its last build did not have: those that this one added, and what one that failed after that left, empty -#}
{% macro anton_table_came(added) -%}
  {%- if anton_active() %}{% do run_query(anton_call('dbt_came', anton_build())) %}{% endif -%}
  {%- set left = run_query("select coalesce(nullif(pg_catalog.current_setting('anton.came', true), ''), '[]')").rows[0][0] -%}
  {{ return((added + fromjson(left, [])) | unique | list) }}
{%- endmacro %}

{#- the SELECT, with the types of its contract where it has one -#}
{% macro anton_table_select(sql) -%}
  {%- set contract = config.get('contract') -%}
  {{ return(get_select_subquery(sql) if contract and contract.enforced else sql) }}
{%- endmacro %}

{#- {name: type} in the table's order -#}
{% macro anton_columns(relation) -%}
  {%- set found = {} -%}
  {%- set rows = run_query("select attname::text, pg_catalog.format_type(atttypid, atttypmod) from pg_catalog.pg_attribute where attrelid = $anton$" ~ relation
       ~ "$anton$::pg_catalog.regclass and attnum > 0 and not attisdropped order by attnum") -%}
  {%- for row in rows.rows -%}{%- do found.update({row[0]: row[1]}) -%}{%- endfor -%}
  {{ return(found) }}
{%- endmacro %}

{% macro anton_table_match(key, one, other) -%}
  {%- for name in key %}{{ one }}.{{ adapter.quote(name) }} = {{ other }}.{{ adapter.quote(name) }}{{ ' and ' if not loop.last }}{% endfor -%}
{%- endmacro %}

{% macro anton_table_list(names, before='') -%}
  {%- for name in names %}{{ before }}{{ adapter.quote(name) }}{{ ', ' if not loop.last }}{% endfor -%}
{%- endmacro %}

{#- a primary key on exactly these columns, if nothing like it is there -#}
{% macro anton_table_key_sql(relation, key) -%}
  do $anton$ begin
    if not exists (
      select from pg_catalog.pg_index i
       where i.indrelid = $anton_name${{ relation.include(database=false) }}$anton_name$::pg_catalog.regclass and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
         and array(select a.attname::text from pg_catalog.unnest(i.indkey[0:i.indnkeyatts - 1]) c join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = c where a.attnotnull order by 1)
           = array(select k from pg_catalog.unnest(array[{% for name in key %}'{{ name | replace("'", "''") }}'{{ ', ' if not loop.last }}{% endfor %}]) k order by 1)) then
      if exists (select from pg_catalog.pg_index where indrelid = $anton_name${{ relation.include(database=false) }}$anton_name$::pg_catalog.regclass and indisprimary) then
        alter table {{ relation }}{% for name in key %} alter {{ adapter.quote(name) }} set not null{{ ',' if not loop.last }}{% endfor %};
        create unique index on {{ relation }} ({{ anton_table_list(key) }});
      else
        alter table {{ relation }} add primary key ({{ anton_table_list(key) }});
      end if;
    end if;
  exception when unique_violation or not_null_violation then
    raise exception using errcode = sqlstate, message = $anton_text$the key ({{ key | join(', ') }}) of {{ model.name }} does not name one row: $anton_text$ || sqlerrm;
  end $anton$
{%- endmacro %}

{#- the rows of the model, in a table that is not logged -#}
{% macro anton_table_fill_sql(relation, sql) -%}
  {%- set contract = config.get('contract') -%}
  {%- if contract and contract.enforced -%}
    {{ get_assert_columns_equivalent(sql) }}
  {%- endif -%}
  create unlogged table {{ relation }} as ({{ anton_table_select(sql) }})
{%- endmacro %}

{#- nearly no row differs, which the planner cannot know: it would not read in parallel. Compiling does not pay.
    4 MB, the default of work_mem, would hash a million rows by way of files. -#}
{% macro anton_table_diff_sql(target_relation, temp, key, want, came) -%}
  set local parallel_setup_cost = 0; set local parallel_tuple_cost = 0; set local jit = off;
  select pg_catalog.set_config('work_mem', '32MB', true) where pg_catalog.pg_size_bytes(pg_catalog.current_setting('work_mem')) < 33554432;
  create temp table anton_table_diff on commit drop as
  select anton_t.ctid as anton_row, case when anton_s.ctid is null then 'd' when anton_t.ctid is null then 'n'{% if came %} when not (false{{ anton_table_differs(key + came, want) }}) then 'c'{% endif %} else 'u' end as anton_op, anton_s.*
    from {{ target_relation }} anton_t full join {{ temp }} anton_s on {{ anton_table_match(key, 'anton_t', 'anton_s') }}
   where anton_t.ctid is null or anton_s.ctid is null{{ anton_table_differs(key, want) }}
{%- endmacro %}

{#- or one of its columns but these differs -#}
{% macro anton_table_differs(but, want) -%}
  {%- set odd = ('json', 'xml', 'point', 'polygon', 'txid_snapshot', 'pg_snapshot', 'box', 'line', 'lseg', 'path', 'circle') -%}
  {%- for name, type in want.items() if name not in but -%}
    {%- set cast = '::text' if type.split('[')[0].split('(')[0] in odd else '' %} or anton_t.{{ adapter.quote(name) }}{{ cast }} is distinct from anton_s.{{ adapter.quote(name) }}{{ cast }}
  {%- endfor -%}
{%- endmacro %}

{#- op: u, or c for records in which nothing differs but columns that came -#}
{% macro anton_table_update_sql(target_relation, key, want, op) -%}
  update {{ target_relation }} t set {% for name in want.keys() | reject('in', key) %}{{ adapter.quote(name) }} = d.{{ adapter.quote(name) }}{{ ', ' if not loop.last }}{% endfor %}
    from pg_temp.anton_table_diff d where d.anton_op = '{{ op }}' and t.ctid = d.anton_row
{%- endmacro %}

{#- rows: how many the model gives -#}
{% macro anton_table_apply_sql(target_relation, rows, key, want) -%}
  do $anton$
  declare v_had bigint; v_new bigint; v_updated bigint; v_deleted bigint;
  begin
    select count(*) filter (where anton_op = 'n'), count(*) filter (where anton_op = 'u'), count(*) filter (where anton_op = 'd')
      into v_new, v_updated, v_deleted from pg_temp.anton_table_diff;
    v_had := (select count(*) from {{ target_relation }});              -- so it is read in parallel, which INTO is not
    if {{ rows }} <> v_had - v_deleted + v_new then
      raise exception using errcode = 'unique_violation', message = $anton_text$the key ({{ key | join(', ') }}) of {{ model.name }} does not name one row: some come more than once$anton_text$;
    end if;
    if v_deleted > 0 then
      delete from {{ target_relation }} t using pg_temp.anton_table_diff d where d.anton_op = 'd' and t.ctid = d.anton_row;
    end if;
    {%- if want.keys() | reject('in', key) | list %}
    if v_updated > 0 then
      {{ anton_table_update_sql(target_relation, key, want, 'u') }};
    end if;
    {%- endif %}
    if v_new > 0 then
      insert into {{ target_relation }} ({{ anton_table_list(want.keys() | list) }})
      select {{ anton_table_list(want.keys() | list) }} from pg_temp.anton_table_diff where anton_op = 'n';
    end if;
    perform pg_catalog.set_config('anton.counts', pg_catalog.jsonb_build_object('new', v_new, 'updated', v_updated, 'deleted', v_deleted)::text, true);
  exception when unique_violation or not_null_violation then
    raise exception using errcode = sqlstate, message = $anton_text$the key ({{ key | join(', ') }}) of {{ model.name }} does not name one row: $anton_text$ || sqlerrm;
  end $anton$
{%- endmacro %}
