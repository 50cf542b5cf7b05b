"use strict";

// No validator badge: its image is at swagger.io.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#viewer",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null,
});
