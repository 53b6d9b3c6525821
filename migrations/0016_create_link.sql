-- How people come in: links that are used once, and the sessions they open. Tokens are kept as hashes only. Names no schema.

create table link (
  token_sha256 text primary key check (token_sha256 ~ '^[0-9a-f]{64}$'),
  person_id int not null references person (id),
  approval_id bigint references approval (id),    -- it shows and decides this one; null: it signs in
  args_sha256 text,                               -- with it: the arguments it was made for
  at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  used_at timestamptz,
  check ((approval_id is null) = (args_sha256 is null))
);
create index on link (expires_at);
create index on link (person_id);

create table session (
  token_sha256 text primary key check (token_sha256 ~ '^[0-9a-f]{64}$'),
  person_id int not null references person (id),
  at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null
);
create index on session (expires_at);
create index on session (person_id);
