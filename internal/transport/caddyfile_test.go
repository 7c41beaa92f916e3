// This file tests the settings' syntax and their checks.

package transport

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// What a Caddyfile says means what it means to reverse_proxy's HTTP transport.
func TestParseTLSAsReverseProxyDoes(t *testing.T) {
	for name, lines := range map[string]string{
		"tls":                      "tls",
		"tls_client_auth files":    "tls_client_auth a.crt a.key",
		"tls_client_auth automate": "tls_client_auth proxy.example",
		"tls_insecure_skip_verify": "tls_insecure_skip_verify",
		"tls_curves":               "tls_curves x25519 secp384r1",
		"tls_timeout":              "tls_timeout 1d",
		"tls_trusted_ca_certs":     "tls_trusted_ca_certs a.pem b.pem",
		"tls_server_name":          "tls_server_name {http.request.host}",
		"tls_renegotiation":        "tls_renegotiation freely",
		"tls_except_ports":         "tls_except_ports 80 8080",
		"tls_trust_pool":           "tls_trust_pool file a.pem b.pem",
		"tls_trust_pool block":     "tls_trust_pool file {\n\tpem_file a.pem\n\tpem_file b.pem\n}",
		"quoted braces":            "tls_server_name \"{\"",
		"an argument of two lines": "tls_trusted_ca_certs \"a\nb\"\ntls_timeout 1s",
		"all": "tls_timeout 1s\ntls_trust_pool file {\n\tpem_file a.pem\n}\ntls\ntls_server_name a\n" +
			"tls_client_auth a.crt a.key\ntls_except_ports 80\ntls_curves x25519\ntls_renegotiation never\ntls_insecure_skip_verify",
	} {
		t.Run(name, func(t *testing.T) {
			var theirs reverseproxy.HTTPTransport
			if err := theirs.UnmarshalCaddyfile(caddyfile.NewTestDispenser("http {\n" + lines + "\n}")); err != nil {
				t.Fatal(err)
			}
			got, err := parse(lines)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, theirs.TLS) {
				t.Errorf("got %+v, want %+v", got, theirs.TLS)
			}
		})
	}
}

func TestParseTLSErrors(t *testing.T) {
	for name, c := range map[string]struct{ lines, want string }{
		"unknown":                   {"tls_nothing", `unrecognized subdirective "tls_nothing"`},
		"not about TLS":             {"read_buffer 1", `unrecognized subdirective "read_buffer"`},
		"surplus of none":           {"tls tls_insecure_skip_verify", `tls: surplus argument "tls_insecure_skip_verify"`},
		"surplus of one":            {"tls_server_name a b", `tls_server_name: surplus argument "b"`},
		"surplus of two":            {"tls_client_auth a b c", `tls_client_auth: surplus argument "c"`},
		"surplus block":             {"tls {\ntls_timeout 1s\n}", `unrecognized subdirective "{"`},
		"missing name":              {"tls_server_name", "tls_server_name: missing argument"},
		"missing ports":             {"tls_except_ports", "tls_except_ports: missing argument"},
		"missing pool":              {"tls_trust_pool {\n}", "tls_trust_pool: missing argument"},
		"empty name":                {`tls_server_name ""`, `tls_server_name: invalid value ""`},
		"bad duration":              {"tls_timeout soon", "tls_timeout: bad timeout value 'soon'"},
		"negative duration":         {"tls_timeout -1s", "tls_timeout must not be negative: -1s"},
		"unknown level":             {"tls_renegotiation sometimes", `unknown tls_renegotiation "sometimes": want never, once or freely`},
		"no port":                   {"tls_except_ports 80 http", `tls_except_ports: invalid port "http"`},
		"port 0":                    {"tls_except_ports 0", `tls_except_ports: invalid port "0"`},
		"port too large":            {"tls_except_ports 65536", `tls_except_ports: invalid port "65536"`},
		"unknown curve":             {"tls_curves x25519 round", `tls_curves: unknown curve "round"`},
		"unknown pool":              {"tls_trust_pool nothing", "tls_trust_pool: getting module named 'tls.ca_pool.source.nothing'"},
		"surplus in a pool's block": {"tls_trust_pool file {\nnothing\n}", "tls_trust_pool: "},
		"two sources of trust":      {"tls_trusted_ca_certs a.pem\ntls_trust_pool file a.pem", "tls_trust_pool: cannot specify both"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(c.lines)
			checkError(t, err, c.want)
			if err != nil && name != "unknown pool" && !strings.Contains(err.Error(), "Testfile:") {
				t.Errorf("error: got %v, want where it is", err)
			}
		})
	}
}

// What JSON can say wrongly is refused as well.
func TestNewRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		settings      *reverseproxy.TLSConfig
		proxyProtocol string
		want          string
	}{
		"unknown version":  {nil, "v3", `unknown proxy_protocol "v3": want v1 or v2`},
		"negative timeout": {&reverseproxy.TLSConfig{HandshakeTimeout: caddy.Duration(-time.Second)}, "", "tls_timeout must not be negative: -1s"},
		"unknown level":    {&reverseproxy.TLSConfig{Renegotiation: "always"}, "", `unknown tls_renegotiation "always"`},
		"no port":          {&reverseproxy.TLSConfig{ExceptPorts: []string{""}}, "", `tls_except_ports: invalid port ""`},
		"unknown curve":    {&reverseproxy.TLSConfig{Curves: []string{"p256"}}, "", `tls_curves: unknown curve "p256"`},
		"a key alone":      {&reverseproxy.TLSConfig{ClientCertificateKeyFile: "a.key"}, "", "tls: client_certificate_key_file specified without client_certificate_file"},
		"no such file":     {&reverseproxy.TLSConfig{ClientCertificateFile: "/nowhere/a", ClientCertificateKeyFile: "/nowhere/b"}, "", "/nowhere/a: no such file"},
		"no such module":   {&reverseproxy.TLSConfig{CARaw: []byte(`{"provider":"nothing"}`)}, "", "unknown module: tls.ca_pool.source.nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
			defer cancel()
			_, err := New(ctx, time.Second, c.settings, c.proxyProtocol)
			checkError(t, err, c.want)
		})
	}
}
