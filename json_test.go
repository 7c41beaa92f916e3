// What JSON can say is refused like what a Caddyfile can.
package holdfast_test

import (
	"strings"
	"testing"
)

// server is a config whose only handler has these fields.
func server(fields string) string {
	handler := strings.TrimRight(`"handler":"websocket_proxy",`+fields, ",")
	return `{"apps":{"http":{"servers":{"s":{"listen":["127.0.0.1:0"],"routes":[{"handle":[{` + handler + `}]}]}}}}}`
}

// app is a handler's upstream, before more of its fields.
const app = `"upstreams":[{"dial":"app:8080"}],`

// A config that only says what is the default provisions like one that says
// nothing, and JSON takes durations as strings.
func TestJSONOfDefaults(t *testing.T) {
	err := provision(t, strings.Replace(server(app+`
		"load_balancing":{"selection_policy":{"policy":"least_conn"},"try_duration":0,"try_interval":"250ms"},
		"health_checks":{"passive":{"fail_duration":0,"unhealthy_latency":0},"migrate_on_unhealthy":false},
		"transport":{"dial_timeout":"3s","handshake_timeout":"10s","proxy_protocol":""},
		"keep_alive":{"ping_interval":"30s","ping_timeout":"30s","idle_timeout":0,"first_data_timeout":0,"max_lifetime":0,"write_timeout":"30s"},
		"resume":{"timeout":"30s","min_interval":"100ms","max_interval":"5s","concurrency":64,"close_codes":[1001,1012,1013],"limit":3},
		"replay":{"mode":"unacked","buffer":5242880,"overflow":"pause"},"drain_window":"10s",
		"limits":{"upstream_max_connections":0,"client_max_message_size":0,"server_max_message_size":0,"allowed_origins":[]},
		"headers":{"default_origin":""},"compression":"on"`), `{"apps":{`, `{"apps":{"connection_registry":{
		"max_connections":0,"max_connections_per_ip":0,"ipv6_prefix":64,
		"orphan_timeout":"10s","shutdown_timeout":"10s","replay_memory":1073741824},`, 1))
	if err != nil {
		t.Error(err)
	}
}

func TestJSONErrors(t *testing.T) {
	for name, c := range map[string]struct{ fields, want string }{
		"no upstream":         {``, "no upstreams"},
		"null upstream":       {`"upstreams":[null]`, `upstream "": want an address`},
		"empty address":       {`"upstreams":[{}]`, `upstream "": want an address`},
		"upstream as string":  {`"upstreams":["app:80"]`, "string into Go struct field WebSocketProxy.upstreams"},
		"repeated upstream":   {`"upstreams":[{"dial":"app:80"},{"dial":"tcp/app:80"}]`, `upstream "tcp/app:80": repeated`},
		"unknown field":       {`"upstream":[]`, `unknown field "upstream"`},
		"placeholder in name": {app + `"name":"{env.ROUTE}"`, `name: placeholders mean nothing here: "{env.ROUTE}"`},
		"bad compression":     {app + `"compression":"brotli"`, `unknown compression mode "brotli"`},
		"negative window":     {app + `"drain_window":"-1s"`, "drain_window must not be negative: -1s"},

		"source without module": {app + `"dynamic_upstreams":{}`, "loading dynamic upstreams: module name not specified with key 'source'"},
		"unknown source":        {`"dynamic_upstreams":{"source":"consul"}`, "loading dynamic upstreams: loading module 'consul'"},
		"unknown in a source":   {`"dynamic_upstreams":{"source":"a","name":"app","ports":"80"}`, `unknown field "ports"`},
		"port as number":        {`"dynamic_upstreams":{"source":"a","name":"app","port":80}`, "number into Go struct field AUpstreams.port"},
		"source without a name": {`"dynamic_upstreams":{"source":"srv","service":"ws","proto":"tcp"}`, `dynamic: "srv" needs a name`},
		"negative refresh":      {`"dynamic_upstreams":{"source":"a","name":"app","refresh":-1}`, "dynamic: refresh must not be negative: -1ns"},
		"no sources":            {`"dynamic_upstreams":{"source":"multi","sources":[]}`, `dynamic: "multi" needs at least one source`},
		"source below multi":    {`"dynamic_upstreams":{"source":"multi","sources":[{"source":"a"}]}`, `dynamic: "a" needs a name`},

		"policy without a name":  {app + `"load_balancing":{"selection_policy":{}}`, `unknown lb_policy "": want one of`},
		"policy as string":       {app + `"load_balancing":{"selection_policy":"first"}`, "reading lb_policy: json: cannot unmarshal string"},
		"unknown policy":         {app + `"load_balancing":{"selection_policy":{"policy":"fastest"}}`, `unknown lb_policy "fastest": want one of`},
		"unknown in a policy":    {app + `"load_balancing":{"selection_policy":{"policy":"first","weight":1}}`, `loading lb_policy "first": loading module 'first': decoding module config: http.reverse_proxy.selection_policies.first: json: unknown field "weight"`},
		"choice of one":          {app + `"load_balancing":{"selection_policy":{"policy":"random_choose","choose":1}}`, `loading lb_policy "random_choose"`},
		"cookie as fallback":     {app + `"load_balancing":{"selection_policy":{"policy":"header","field":"X-A","fallback":{"policy":"cookie"}}}`, `lb_policy: "cookie" cannot be a fallback of query or header`},
		"negative retries":       {app + `"load_balancing":{"retries":-1}`, "lb_retries must be at least 0: -1"},
		"retries as string":      {app + `"load_balancing":{"retries":"3"}`, "string into Go struct field LoadBalancing.load_balancing.retries"},
		"half a retry":           {app + `"load_balancing":{"retries":0.5}`, "number 0.5 into Go struct field LoadBalancing.load_balancing.retries"},
		"negative try_duration":  {app + `"load_balancing":{"try_duration":-1}`, "lb_try_duration must not be negative: -1ns"},
		"zero try_interval":      {app + `"load_balancing":{"try_interval":0}`, "lb_try_interval must be positive: 0s"},
		"try_interval in words":  {app + `"load_balancing":{"try_interval":"soon"}`, `invalid duration "soon"`},
		"unknown load balancing": {app + `"load_balancing":{"retry_match":[]}`, `unknown field "retry_match"`},

		"active without a check":     {app + `"health_checks":{"active":{}}`, "an active health check needs health_ws or health_http"},
		"schedule without a check":   {app + `"health_checks":{"active":{"passes":2}}`, "health_passes needs health_ws or health_http"},
		"zero interval":              {app + `"health_checks":{"active":{"ws":{},"interval":0}}`, "health_interval must be positive: 0s"},
		"negative check timeout":     {app + `"health_checks":{"active":{"ws":{},"timeout":"-1s"}}`, "health_timeout must be positive: -1s"},
		"zero fails":                 {app + `"health_checks":{"active":{"ws":{},"fails":0}}`, "health_fails must be at least 1: 0"},
		"zero passes":                {app + `"health_checks":{"active":{"http":{},"passes":0}}`, "health_passes must be at least 1: 0"},
		"relative URI":               {app + `"health_checks":{"active":{"http":{"uri":"health"}}}`, `health_http: invalid URI "health": it must begin with /`},
		"port 0":                     {app + `"health_checks":{"active":{"ws":{"port":0}}}`, `health_ws: port: invalid port "0"`},
		"port of a check as string":  {app + `"health_checks":{"active":{"ws":{"port":"80"}}}`, "string into Go struct field WSCheck.health_checks.active.ws.Exchange.port"},
		"method of ws":               {app + `"health_checks":{"active":{"ws":{"method":"GET"}}}`, `unknown field "method"`},
		"unknown method":             {app + `"health_checks":{"active":{"http":{"method":"G T"}}}`, `health_http: method: invalid method "G T"`},
		"header of the handshake":    {app + `"health_checks":{"active":{"ws":{"headers":{"Upgrade":["x"]}}}}`, `health_ws: header: "Upgrade" is up to the check`},
		"status as number":           {app + `"health_checks":{"active":{"ws":{"expect_status":[101]}}}`, "number into Go struct field WSCheck.health_checks.active.ws.Exchange.expect_status"},
		"unknown status":             {app + `"health_checks":{"active":{"ws":{"expect_status":["ok"]}}}`, `health_ws: expect_status: invalid status "ok"`},
		"null rule":                  {app + `"health_checks":{"active":{"ws":{"expect_headers":[null]}}}`, `health_ws: expect_header: invalid field ""`},
		"value and pattern":          {app + `"health_checks":{"active":{"ws":{"expect_headers":[{"field":"X-A","value":"a","pattern":"b"}]}}}`, `health_ws: expect_header: X-A: value "a" and pattern "b" exclude each other`},
		"bad body":                   {app + `"health_checks":{"active":{"http":{"expect_body":"("}}}`, `health_http: expect_body: invalid regexp "("`},
		"max_fails without duration": {app + `"health_checks":{"passive":{"max_fails":3}}`, "max_fails needs a fail_duration"},
		"max_fails of no duration":   {app + `"health_checks":{"passive":{"fail_duration":0,"max_fails":3}}`, "max_fails needs a fail_duration"},
		"zero max_fails":             {app + `"health_checks":{"passive":{"fail_duration":"1s","max_fails":0}}`, "max_fails must be at least 1: 0"},
		"negative fail_duration":     {app + `"health_checks":{"passive":{"fail_duration":"-1s","max_fails":3}}`, "fail_duration must not be negative: -1s"},
		"latency without duration":   {app + `"health_checks":{"passive":{"unhealthy_latency":"1s"}}`, "unhealthy_latency needs a fail_duration"},
		"negative latency":           {app + `"health_checks":{"passive":{"fail_duration":"1s","unhealthy_latency":"-1s"}}`, "unhealthy_latency must not be negative: -1s"},
		"migration without checks":   {app + `"health_checks":{"migrate_on_unhealthy":true}`, "migrate_on_unhealthy needs health checks"},
		"migration as string":        {app + `"health_checks":{"migrate_on_unhealthy":"yes"}`, "string into Go struct field HealthChecks.health_checks.migrate_on_unhealthy"},

		"zero dial":               {app + `"transport":{"dial_timeout":0}`, "dial_timeout must be positive: 0s"},
		"unknown PROXY version":   {app + `"transport":{"proxy_protocol":"V1"}`, `unknown proxy_protocol "V1": want v1 or v2`},
		"PROXY version as number": {app + `"transport":{"proxy_protocol":2}`, "number into Go struct field Transport.transport.proxy_protocol"},
		"TLS against the scheme":  {`"upstreams":[{"dial":"ws://app"}],"transport":{"tls":{}}`, `upstream "ws://app": its scheme is without TLS, but there are TLS settings`},
		"unknown in TLS":          {app + `"transport":{"tls":{"server_names":"app"}}`, `unknown field "server_names"`},
		"negative TLS timeout":    {app + `"transport":{"tls":{"handshake_timeout":-1}}`, "tls_timeout must not be negative: -1ns"},
		"certificate without key": {app + `"transport":{"tls":{"client_certificate_file":"client.crt"}}`, "tls: client_certificate_file specified without client_certificate_key_file"},
		"unknown renegotiation":   {app + `"transport":{"tls":{"renegotiation":"always"}}`, `unknown tls_renegotiation "always"`},
		"unknown curve":           {app + `"transport":{"tls":{"curves":["round"]}}`, `tls_curves: unknown curve "round"`},
		"port without TLS":        {app + `"transport":{"tls":{"except_ports":["http"]}}`, `tls_except_ports: invalid port "http"`},
		"unknown trust pool":      {app + `"transport":{"tls":{"ca":{"provider":"vault"}}}`, "tls: failed to load ca module: loading module 'vault'"},
		"no certificate":          {app + `"transport":{"tls":{"root_ca_pool":["?"]}}`, "tls: parsing CA certificate: illegal base64 data"},

		"negative timeout":      {app + `"resume":{"timeout":"-1s"}`, "resume_timeout must not be negative: -1s"},
		"zero min_interval":     {app + `"resume":{"min_interval":0}`, "resume_interval must be positive: 0s"},
		"max below default min": {app + `"resume":{"max_interval":"1ms"}`, "resume_interval: the longest, 1ms, must not be shorter than the shortest, 100ms"},
		"zero concurrency":      {app + `"resume":{"concurrency":0}`, "resume_concurrency must be at least 1: 0"},
		"negative limit":        {app + `"resume":{"limit":-1}`, "resume_limit must be at least 0: -1"},
		"no close code":         {app + `"resume":{"close_codes":[1001,1006]}`, "resume_on: 1006 is no close code"},
		"close code too large":  {app + `"resume":{"close_codes":[65536]}`, "65536 into Go struct field Resume.resume.close_codes"},
		"negative close code":   {app + `"resume":{"close_codes":[-1]}`, "-1 into Go struct field Resume.resume.close_codes"},
		"unknown in resume":     {app + `"resume":{"max":1}`, `unknown field "max"`},
		"unknown mode":          {app + `"replay":{"mode":"all"}`, `unknown replay "all": want unacked, unsent, strict or off`},
		"zero buffer":           {app + `"replay":{"buffer":0}`, "replay_buffer must be positive: 0"},
		"negative buffer":       {app + `"replay":{"buffer":-5}`, "replay_buffer must be positive: -5"},
		"buffer with a unit":    {app + `"replay":{"buffer":"5MiB"}`, "string into Go struct field Replay.replay.buffer"},
		"buffer too large":      {app + `"replay":{"buffer":9223372036854775808}`, "into Go struct field Replay.replay.buffer"},
		"unknown overflow":      {app + `"replay":{"overflow":"drop"}`, `unknown replay_overflow "drop": want pause or close`},

		"negative max_connections":    {app + `"limits":{"max_connections":-1}`, "max_connections must be at least 0: -1"},
		"negative limit per IP":       {app + `"limits":{"max_connections_per_ip":-1}`, "max_connections_per_ip must be at least 0: -1"},
		"negative limit per upstream": {app + `"limits":{"upstream_max_connections":-1}`, "upstream_max_connections must be at least 0: -1"},
		"limit as string":             {app + `"limits":{"max_connections":"many"}`, "string into Go struct field Limits.limits.max_connections"},
		"prefix of a route":           {app + `"limits":{"ipv6_prefix":64}`, `unknown field "ipv6_prefix"`},
		"negative size of clients":    {app + `"limits":{"client_max_message_size":-1}`, "client_max_message_size must be at least 0: -1"},
		"negative size of backends":   {app + `"limits":{"server_max_message_size":-1}`, "server_max_message_size must be at least 0: -1"},
		"size with a unit":            {app + `"limits":{"server_max_message_size":"1MiB"}`, "string into Go struct field Limits.limits.server_max_message_size"},
		"null origin":                 {app + `"limits":{"allowed_origins":[null]}`, `allowed_origins: invalid pattern "": it is empty`},
		"origin with a path":          {app + `"limits":{"allowed_origins":["https://a/b"]}`, `allowed_origins: invalid pattern "https://a/b"`},
		"origins as string":           {app + `"limits":{"allowed_origins":"*"}`, "string into Go struct field Limits.limits.allowed_origins"},

		"default origin without scheme": {app + `"headers":{"default_origin":"example.com"}`, `default_origin: invalid origin "example.com"`},
		"name of a header":              {app + `"headers":{"request":{"set":{"X A":["b"]}}}`, `header_up: invalid field name "X A"`},
		"name of no header":             {app + `"headers":{"response":{"delete":[""]}}`, `header_down: invalid field name ""`},
		"two searches":                  {app + `"headers":{"request":{"replace":{"X-A":[{"search":"a","search_regexp":"b"}]}}}`, "header_up: cannot specify both"},
		"bad search":                    {app + `"headers":{"response":{"replace":{"X-A":[{"search_regexp":"("}]}}}`, "header_down: replacement 0 for header field 'X-A'"},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, provision(t, server(c.fields)), c.want)
		})
	}
}

// A passthrough's settings are refused likewise.
func TestPassthroughJSONErrors(t *testing.T) {
	for fields, want := range map[string]string{
		``:                                     "no upstreams",
		`"upstreams":[{}]`:                     `upstream "": want an address`,
		`"upstreams":[{"dial":"https://app"}]`: `upstream "https://app": want host:port`,
		raw + `"load_balancing":{"selection_policy":{"policy":"cookie"}}`: `lb_policy "cookie" cannot be used here`,
		raw + `"health_checks":{"active":{}}`:                             "an active health check needs health_tcp or health_tls",
		raw + `"health_checks":{"close_if_unhealthy":true}`:               "close_if_unhealthy needs health_tcp or health_tls",
		raw + `"health_checks":{"passive":{"unhealthy_latency":1}}`:       `unknown field "unhealthy_latency"`,
		raw + `"health_checks":{"migrate_on_unhealthy":true}`:             `unknown field "migrate_on_unhealthy"`,
		raw + `"transport":{"dial_timeout":0}`:                            "dial_timeout must be positive: 0s",
		raw + `"transport":{"tls":{}}`:                                    `unknown field "tls"`,
		raw + `"keep_alive":{"ping_interval":"30s"}`:                      `unknown field "ping_interval"`,
		raw + `"keep_alive":{"treatment":"eternal"}`:                      `unknown keep_alive_treatment "eternal"`,
		raw + `"keep_alive":{"tcp_keepalive":{"idle":0,"count":3}}`:       "tcp_keepalive is off, and can have no interval and no count",
		raw + `"limits":{"max_connections":-1}`:                           "max_connections must be at least 0: -1",
		raw + `"limits":{"client_max_message_size":1}`:                    `unknown field "client_max_message_size"`,
		raw + `"replay":{}`:                                               `unknown field "replay"`,
		raw + `"log":"yes"`:                                               "string into Go struct field SNIPassthrough.log",
		raw + `"name":"{env.ROUTE}"`:                                      `name: placeholders mean nothing here`,
	} {
		t.Run(fields, func(t *testing.T) {
			wantError(t, provision(t, layer4Server(fields)), want)
		})
	}
}

// A name belongs to one route: a WebSocket's and a passthrough's are two.
func TestNameOfTwoKinds(t *testing.T) {
	const named = `"name":"both","upstreams":[{"dial":"app:8080"}]`
	one, two := server(named), layer4Server(named)
	both := strings.TrimSuffix(one, "}}") + "," + strings.TrimPrefix(two, `{"apps":{`)
	wantError(t, provision(t, both), `route name "both" is used by`, "with different settings")
}

// layer4Server is a config whose only passthrough has these fields.
func layer4Server(fields string) string {
	handler := strings.TrimRight(`"handler":"sni_passthrough",`+fields, ",")
	return `{"apps":{"layer4":{"servers":{"s":{"listen":["127.0.0.1:0"],"routes":[{"handle":[{` + handler + `}]}]}}}}}`
}

// raw is a passthrough's upstream, before more of its fields.
const raw = `"upstreams":[{"dial":"app:443"}],`

func TestRegistryJSONErrors(t *testing.T) {
	for registry, want := range map[string]string{
		`{"max_connections":-1}`:        "max_connections must be at least 0: -1",
		`{"max_connections":"5"}`:       "string into Go struct field ConnectionRegistry.max_connections",
		`{"max_connections_per_ip":-1}`: "max_connections_per_ip must be at least 0: -1",
		`{"ipv6_prefix":0}`:             "max_connections_per_ip: the IPv6 prefix must be 1 to 128: 0",
		`{"ipv6_prefix":129}`:           "max_connections_per_ip: the IPv6 prefix must be 1 to 128: 129",
		`{"orphan_timeout":-1}`:         "orphan_timeout must not be negative: -1ns",
		`{"shutdown_timeout":"-1s"}`:    "shutdown_timeout must not be negative: -1s",
		`{"long_lived":"-1s"}`:          "long_lived must not be negative: -1s",
		`{"pressure":0}`:                "pressure must be 1 to 100 percent: 0",
		`{"pressure":101}`:              "pressure must be 1 to 100 percent: 101",
		`{"replay_memory":0}`:           "replay_memory must be positive: 0",
		`{"replay_memory":-5}`:          "replay_memory must be positive: -5",
		`{"replay_memory":"1GiB"}`:      "string into Go struct field ConnectionRegistry.replay_memory",
		`{"replay_memory":1e30}`:        "1e30 into Go struct field ConnectionRegistry.replay_memory",
		`{"replay_memory_limit":100}`:   `unknown field "replay_memory_limit"`,
	} {
		t.Run(registry, func(t *testing.T) {
			wantError(t, provision(t, `{"apps":{"connection_registry":`+registry+`}}`), want)
		})
	}
}
