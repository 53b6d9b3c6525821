{{ config(materialized='ephemeral') }} select * from {{ source('app','orders') }} where total > 0
