// This file tests allowed_origins.

package handshake

import (
	"net/http"
	"strings"
	"testing"
)

func TestAllowedOrigins(t *testing.T) {
	for _, test := range []struct {
		name     string
		patterns []string
		origins  []string // the client's headers
		want     bool
	}{
		{"none listed", nil, []string{"https://evil.example"}, true},
		{"none listed, several headers", nil, []string{"https://a.example", "not one"}, true},
		{"no browser", []string{"example.com"}, nil, true},
		{"empty header", []string{"*"}, []string{""}, false},
		{"host", []string{"example.com"}, []string{"https://example.com"}, true},
		{"host with any scheme", []string{"example.com"}, []string{"http://example.com"}, true},
		{"another host", []string{"example.com"}, []string{"https://example.org"}, false},
		{"one of several", []string{"a.example", "b.example"}, []string{"https://b.example"}, true},
		{"the request's own host is not special", []string{"other.example"}, []string{"https://example.com"}, false},
		{"host, but the origin has a port", []string{"example.com"}, []string{"https://example.com:8443"}, false},
		{"port", []string{"example.com:8443"}, []string{"https://example.com:8443"}, true},
		{"another port", []string{"example.com:8443"}, []string{"https://example.com:8444"}, false},
		{"any port", []string{"example.com:*"}, []string{"https://example.com:8444"}, true},
		{"suffix of the host", []string{"example.com"}, []string{"https://evilexample.com"}, false},
		{"prefix of the host", []string{"example.com"}, []string{"https://example.com.evil.example"}, false},
		{"subdomain", []string{"example.com"}, []string{"https://a.example.com"}, false},
		{"any subdomain", []string{"*.example.com"}, []string{"https://a.b.example.com"}, true},
		{"any subdomain, but it has none", []string{"*.example.com"}, []string{"https://example.com"}, false},
		{"any subdomain, of another", []string{"*.example.com"}, []string{"https://a.example.com.evil.example"}, false},
		{"scheme", []string{"https://example.com"}, []string{"https://example.com"}, true},
		{"another scheme", []string{"https://example.com"}, []string{"http://example.com"}, false},
		{"scheme and any subdomain", []string{"https://*.example.com"}, []string{"https://a.example.com"}, true},
		{"any scheme", []string{"*://example.com"}, []string{"capacitor://example.com"}, true},
		{"any", []string{"*"}, []string{"https://evil.example:1"}, true},
		{"any with a scheme", []string{"https://*"}, []string{"http://evil.example"}, false},
		{"one character", []string{"a?.example"}, []string{"https://a1.example"}, true},
		{"class", []string{"[ab].example"}, []string{"https://b.example"}, true},
		{"case of the pattern", []string{"HTTPS://Example.COM"}, []string{"https://example.com"}, true},
		{"case of the origin", []string{"example.com"}, []string{"HTTPS://EXAMPLE.COM"}, true},
		{"extension", []string{"chrome-extension://abcdefgh"}, []string{"chrome-extension://abcdefgh"}, true},
		{"IPv4", []string{"http://127.0.0.1:*"}, []string{"http://127.0.0.1:3000"}, true},
		{"IPv6", []string{"[2001:db8::1]:8080"}, []string{"http://[2001:DB8::1]:8080"}, true},
		{"IPv6 with a scheme", []string{"http://[::1]"}, []string{"http://[::1]"}, true},
		{"IPv6 is no class", []string{"[::1]"}, []string{"http://1"}, false},
		{"file", []string{"file://"}, []string{"file://"}, true},
		{"file is no host", []string{"*"}, []string{"file://"}, false},
		{"null", []string{"null"}, []string{"null"}, true},
		{"null in another case is none", []string{"null"}, []string{"Null"}, false},
		{"pattern null in another case", []string{"NULL"}, []string{"null"}, true},
		{"null is not any", []string{"*", "n*", "nul?", "*://*", "[a://n]*"}, []string{"null"}, false},
		{"a host of that name is not null", []string{"null"}, []string{"https://null"}, false},

		{"two headers", []string{"*"}, []string{"https://example.com", "https://example.com"}, false},
		{"two in one", []string{"*"}, []string{"https://example.com https://evil.example"}, false},
		{"two with a comma", []string{"*"}, []string{"https://evil.example,a.example.com"}, false},
		{"path", []string{"*"}, []string{"https://example.com/"}, false},
		{"query", []string{"*"}, []string{"https://example.com?x"}, false},
		{"empty query", []string{"*"}, []string{"https://example.com?"}, false},
		{"fragment", []string{"*"}, []string{"https://example.com#"}, false},
		{"user", []string{"*.example.com"}, []string{"https://a.example.com@evil.example"}, false},
		{"user of the right one", []string{"*"}, []string{"https://user@example.com"}, false},
		{"no scheme", []string{"example.com"}, []string{"example.com"}, false},
		{"no scheme, but slashes", []string{"example.com"}, []string{"//example.com"}, false},
		{"no host", []string{"*", "https://*"}, []string{"https://"}, false},
		{"port alone", []string{"*", "https://*"}, []string{"https://:443"}, false},
		{"empty port", []string{"*"}, []string{"https://example.com:"}, false},
		{"port that is no number", []string{"*"}, []string{"https://example.com:https"}, false},
		{"one slash", []string{"*"}, []string{"https:/example.com"}, false},
		{"opaque", []string{"*"}, []string{"data:example.com"}, false},
		{"escaped", []string{"*"}, []string{"https://ex%61mple.com"}, false},
		{"backslash", []string{"*"}, []string{`https://example.com\.evil.example`}, false},
		{"wildcard", []string{"*"}, []string{"https://*"}, false},
		{"a letter whose lower case is k", []string{"k.example"}, []string{"https://\u212a.example"}, false},
		{"not ASCII", []string{"*"}, []string{"https://exämple.com"}, false},
		{"not UTF-8", []string{"*"}, []string{"https://ex\xffmple.com"}, false},
		{"IPv6 that is none", []string{"*"}, []string{"https://[example]"}, false},
		{"IPv6 with a zone", []string{"*"}, []string{"https://[fe80::1%25eth0]"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			allowed, err := ParseOrigins(test.patterns)
			if err != nil {
				t.Fatal(err)
			}
			r := received(t, get)
			if test.origins != nil {
				r.Header["Origin"] = test.origins
			}
			no := Check(r, allowed)
			if (no == nil) != test.want {
				t.Fatalf("got %+v, want allowed: %t", no, test.want)
			}
			if no != nil && (no.Status != http.StatusForbidden || no.Err == nil) {
				t.Errorf("got status %d, error %v, want 403", no.Status, no.Err)
			}
		})
	}
}

// What else is wrong with a handshake comes first.
func TestOriginIsCheckedLast(t *testing.T) {
	allowed, err := ParseOrigins([]string{"example.com"})
	if err != nil {
		t.Fatal(err)
	}
	const evil = "Origin: https://evil.example"
	for want, lines := range map[int][]string{
		http.StatusForbidden:       {evil},
		http.StatusUpgradeRequired: {evil, "Sec-WebSocket-Version: 8"},
		http.StatusBadRequest:      {evil, "Sec-WebSocket-Key: c2hvcnQ="},
	} {
		if no := Check(received(t, get, lines...), allowed); no == nil || no.Status != want {
			t.Errorf("%q: got %+v, want %d", lines, no, want)
		}
	}
}

func TestPatternsThatNeverMatchAreErrors(t *testing.T) {
	for _, pattern := range []string{
		"", "://", "://example.com", "https://", "*://", "https://example.com/", "https://example.com/path", "example.com/", "user@example.com",
		"https://example.com#x", "exam ple.com", "https://exämple.com", "[a.example", "a[]b", `a\`, "https://[::1", "a\tb", "\u212a.example",
	} {
		_, err := ParseOrigins([]string{"example.com", pattern})
		if err == nil {
			t.Errorf("%q: got no error", pattern)
		} else if want := `allowed_origins: invalid pattern "`; !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: got error %q, want it to begin with %s", pattern, err, want)
		}
	}
	_, err := ParseOrigins([]string{"https://example.com/path"})
	if want := `allowed_origins: invalid pattern "https://example.com/path": an origin has scheme, host and port only`; err == nil || err.Error() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
}

func FuzzOrigins(f *testing.F) {
	for _, seed := range [][2]string{
		{"example.com", "https://example.com"},
		{"https://*.example.com:*", "https://a.example.com:8443"},
		{"null", "null"},
		{"*", "null"},
		{"[::1]:80", "http://[::1]:80"},
		{"[a-c]?.example", "http://b1.example"},
		{`\*`, "x://*"},
		{"file://", "file://"},
		{"*", "https://a,b"},
		{"[", "https://["},
		{"https://example.com", "https://example.com/"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, pattern, value string) {
		origins, err := ParseOrigins([]string{pattern})
		if err != nil {
			if len(origins) > 0 {
				t.Fatal("got patterns beside an error, which would allow all but these")
			}
			return
		}
		got := origins.match(value)
		parsed, err := parseOrigin(value)
		switch {
		case value == opaqueOrigin:
			if got != strings.EqualFold(pattern, opaqueOrigin) {
				t.Errorf("null by %q: got %t", pattern, got)
			}
			return
		case err != nil:
			if got {
				t.Errorf("%q by %q: got it allowed, want only origins allowed", value, pattern)
			}
			return
		}
		if !strings.EqualFold(parsed.scheme+"://"+parsed.host, value) || strings.ContainsAny(parsed.host, "/@?#,* \\") {
			t.Errorf("%q: got scheme %q and host %q", value, parsed.scheme, parsed.host)
		}
		if other := origins.match(strings.ToUpper(value)); other != got {
			t.Errorf("%q by %q: got %t, in upper case %t", value, pattern, got, other)
		}
		if anyOf := (Origins{{text: "nothing"}, origins[0]}).match(value); anyOf != got {
			t.Errorf("%q by %q: got %t, as the second of two %t", value, pattern, got, anyOf)
		}
		// An origin is a pattern of itself.
		if self, err := ParseOrigins([]string{value}); err != nil || !self.match(value) {
			t.Errorf("%q: got no match of itself, error %v", value, err)
		}
	})
}
