-- within(value, rule) -> whether what is inside a jsonb value means what its Table's model says; for CHECKs
-- rule: {"text": {min, max, pattern}} | {"number": {ge, gt, le, lt, step, places}} | {"each": rule} | {"items": [rule, …]} | {"keys": rule, "values": rule}
--       | {"fields": {name: rule}} | {"any": [rule, …]}; {"null": true} besides, where there may be none. A field that is missing, or has no rule, is not
-- looked at. A number may be written as text. It calls itself as its owner: who writes to the Table needs no right to the schema.
create or replace function within(p_value jsonb, p_rule jsonb) returns boolean
language plpgsql immutable strict parallel safe security definer set search_path from current as $$
declare v_kind text := jsonb_typeof(p_value); v_text text; v_number numeric; r jsonb;
begin
  if v_kind = 'null' then
    return p_rule ? 'null';
  elsif p_rule ? 'any' then
    return exists (select from jsonb_array_elements(p_rule -> 'any') one where within(p_value, one));
  elsif p_rule ? 'each' then
    if v_kind <> 'array' then
      return false;
    end if;
    r := p_rule -> 'each';
    return not exists (select from jsonb_array_elements(p_value) one where not within(one, r));
  elsif p_rule ? 'items' then
    if v_kind <> 'array' then
      return false;
    end if;
    return not exists (select from rows from (jsonb_array_elements(p_rule -> 'items'), jsonb_array_elements(p_value)) x (rule, value)
                        where not within(value, rule));
  elsif p_rule ? 'fields' then
    if v_kind <> 'object' then
      return false;
    end if;
    return not exists (select from jsonb_each(p_rule -> 'fields') f where not within(p_value -> f.key, f.value));
  elsif p_rule ? 'keys' or p_rule ? 'values' then
    if v_kind <> 'object' then
      return false;
    end if;
    return not exists (select from jsonb_each(p_value) e where not within(to_jsonb(e.key), p_rule -> 'keys') or not within(e.value, p_rule -> 'values'));
  elsif p_rule ? 'text' then
    r := p_rule -> 'text';
    v_text := p_value #>> '{}';
    return v_kind = 'string' and char_length(v_text) >= coalesce((r ->> 'min')::int, 0) and char_length(v_text) <= coalesce((r ->> 'max')::int, 2147483647)
           and v_text ~ coalesce(r ->> 'pattern', '');
  elsif p_rule ? 'number' then
    r := p_rule -> 'number';
    v_text := p_value #>> '{}';
    if v_kind not in ('number', 'string') or v_text !~ '^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?$' then
      return false;
    end if;
    v_number := v_text::numeric;
    return v_number >= coalesce((r ->> 'ge')::numeric, v_number) and v_number <= coalesce((r ->> 'le')::numeric, v_number)
           and coalesce(v_number > (r ->> 'gt')::numeric, true) and coalesce(v_number < (r ->> 'lt')::numeric, true)
           and coalesce(v_number % (r ->> 'step')::numeric = 0, true) and scale(trim_scale(v_number)) <= coalesce((r ->> 'places')::int, 16383);
  end if;
  return true;
end $$;
grant execute on function within(jsonb, jsonb) to public;        -- CHECKs run as who writes
