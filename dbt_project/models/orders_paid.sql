{{ config(materialized='view') }}
select id, customer, country, total, placed_at from {{ source('shop', 'orders') }} where status = 'paid'
