{{- define "llmops-api.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* At most 40 characters: names of Jobs and pods get suffixes. */}}
{{- define "llmops-api.fullname" -}}
{{- $name := include "llmops-api.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* The labels that never change: selectors and volume claims are immutable. */}}
{{- define "llmops-api.selector" -}}
app.kubernetes.io/name: {{ include "llmops-api.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "llmops-api.labels" -}}
{{ include "llmops-api.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: llmops
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "llmops-api.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "llmops-api.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "llmops-api.image" -}}
{{- with .Values.image }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- with .digest }}@{{ . }}{{ end }}
{{- end }}
{{- end }}

{{/* A value as the service reads it: Helm has large numbers as 1.048576e+06. */}}
{{- define "llmops-api.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{- define "llmops-api.port" -}}
{{- include "llmops-api.text" (default 8000 .Values.settings.PORT) }}
{{- end }}

{{/* SHUTDOWN_TIMEOUT_S, the five seconds of the steps after it, and the sleep before it. */}}
{{- define "llmops-api.terminationS" -}}
{{- add (ceil (default 30 .Values.settings.SHUTDOWN_TIMEOUT_S) | int) 5 (int .Values.preStopSleepS) }}
{{- end }}

{{/* The longest answer and ten seconds: whoever is in front must not end a stream before the service does. */}}
{{- define "llmops-api.streamS" -}}
{{- add (ceil (default 600 .Values.settings.STREAM_TIMEOUT_S) | int) 10 }}
{{- end }}

{{/* The settings of the ConfigMap. OTEL_RESOURCE_ATTRIBUTES is put together in each pod. */}}
{{- define "llmops-api.settings" -}}
{{- range $name, $value := omit .Values.settings "OTEL_RESOURCE_ATTRIBUTES" }}
{{ $name }}: {{ include "llmops-api.text" $value | quote }}
{{- end }}
{{- end }}

{{- define "llmops-api.secretEnv" -}}
{{- range $name, $ref := .Values.secretSettings }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef: {name: {{ $ref.secret | quote }}, key: {{ $ref.key | quote }}}
{{- end }}
{{- end }}

{{/* The pod's own attributes come last: where a key is twice, the last one counts. */}}
{{- define "llmops-api.resourceEnv" -}}
{{- range $name, $path := dict "K8S_NAMESPACE_NAME" "metadata.namespace" "K8S_NODE_NAME" "spec.nodeName" "K8S_POD_NAME" "metadata.name" "K8S_POD_UID" "metadata.uid" }}
- name: {{ $name }}
  valueFrom:
    fieldRef: {apiVersion: v1, fieldPath: {{ $path }}}
{{- end }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: {{ printf "%sk8s.namespace.name=$(K8S_NAMESPACE_NAME),k8s.node.name=$(K8S_NODE_NAME),k8s.pod.name=$(K8S_POD_NAME),k8s.pod.uid=$(K8S_POD_UID)" (ternary (printf "%s," (trimSuffix "," (toString .Values.settings.OTEL_RESOURCE_ATTRIBUTES))) "" (not (empty .Values.settings.OTEL_RESOURCE_ATTRIBUTES))) | quote }}
{{- end }}

{{- define "llmops-api.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# Not on each mount: it would let the group write to the spool, which the service then refuses.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "llmops-api.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "llmops-api.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end }}

{{/* What the schema cannot say: values that contradict each other. */}}
{{- define "llmops-api.check" -}}
{{- range $name, $_ := .Values.secretSettings }}
{{- if hasKey $.Values.settings $name }}{{ fail (printf "%s is in settings and in secretSettings: keep one of them" $name) }}{{ end }}
{{- end }}
{{- range $name := list "JWT_SECRET_KEY" "AUTH_ADMIN_PASSWORD" "AUTH_USER_PASSWORD" }}
{{- if not (hasKey $.Values.secretSettings $name) }}{{ fail (printf "secretSettings needs %s: the service does not start without it" $name) }}{{ end }}
{{- end }}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicaCount) 1) }}
{{- if not (hasKey .Values.secretSettings "DATABASE_URL") }}{{ fail "More than one pod needs DATABASE_URL in secretSettings: a PostgreSQL database, as each pod would have keys and budgets of its own" }}{{ end }}
{{- if not (or .Values.settings.QDRANT_URL (hasKey .Values.secretSettings "QDRANT_URL")) }}{{ fail "More than one pod needs QDRANT_URL in settings: the embedded store belongs to one process" }}{{ end }}
{{- end }}
{{- if and .Values.networkPolicy.enabled (or .Values.ingress.enabled .Values.gateway.enabled) (not .Values.networkPolicy.ingress.from) }}
{{- fail "networkPolicy.ingress.from must name the namespace of the ingress controller or gateway: without it nothing reaches the API" }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}{{ fail "ingress.hosts must name a host" }}{{ end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}{{ fail "gateway.parentRefs must name a Gateway" }}{{ end }}
{{- if .Values.autoscaling.enabled }}
{{- if not .Values.autoscaling.prometheus.serverAddress }}{{ fail "autoscaling.prometheus.serverAddress must be the address of Prometheus" }}{{ end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}{{ fail "autoscaling.minReplicas is more than maxReplicas" }}{{ end }}
{{- end }}
{{- if and .Values.replay.ordinals (not .Values.persistence.enabled) }}{{ fail "replay.ordinals needs persistence: there is no volume to read" }}{{ end }}
{{- end }}
