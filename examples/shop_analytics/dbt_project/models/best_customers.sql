{{ config(materialized='view') }}
select * from {{ ref('customers') }} order by revenue desc limit 10
