{{ config(materialized='view') }} select * from {{ ref('revenue') }} where revenue > 100
